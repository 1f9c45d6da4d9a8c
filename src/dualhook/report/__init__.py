"""Pictures of a memory's answers; every module here needs ``dualhook[plot]``."""
