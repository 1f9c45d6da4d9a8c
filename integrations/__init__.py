"""Bridges to other libraries, one module each; a module imports its library, this package imports none."""
