"""Make the text that ships with the package: whole books of the King James Version, one verse a line.

``python benchmarks/make_text_subset.py --source kjv.txt.gz``, where every line of the source is a verse after its place
(``Ge1:1 In the beginning God created the heaven and the earth.``), as in Debian's package bible-kjv-text.
"""

from __future__ import annotations

import argparse
import gzip
import re
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "src" / "dualhook" / "data" / "king_james_subset.txt.gz"
# stories mostly; Mark tells much of what Matthew tells, often in the same words
BOOKS = {
    "Ge": "Genesis",
    "Ruth": "Ruth",
    "Eccl": "Ecclesiastes",
    "Jonah": "Jonah",
    "Mat": "Matthew",
    "Mark": "Mark",
}
VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+:\d+) (\S.*)")  # book, place, text


def subset(source: Path) -> list[str]:
    """Lines of a reference, a tab and the verse, in the order of the source."""
    lines = []
    for number, line in enumerate(gzip.decompress(source.read_bytes()).decode("ascii").splitlines(), 1):
        verse = VERSE.fullmatch(line.strip())
        if verse is None:
            raise SystemExit(f"{source}, line {number}: {line[:40]!r}, expected a verse like 'Ge1:1 In the beginning'")
        book, place, text = verse.groups()
        if book in BOOKS:
            lines.append(f"{BOOKS[book]} {place}\t{text}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="the whole text, gzipped")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the file to write (default: the shipped one)")
    options = parser.parse_args()
    lines = subset(options.source)
    content = "".join(f"{line}\n" for line in lines).encode("ascii")
    options.out.write_bytes(gzip.compress(content, 9, mtime=0))  # no time stamp: the same text gives the same file
    size = options.out.stat().st_size
    print(f"{options.out}: {len(lines):,} verses, {len(content) / 1e3:.0f} kB, {size / 1e3:.0f} kB gzipped")


if __name__ == "__main__":
    main()
