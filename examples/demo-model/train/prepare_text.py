"""Collect the demo model's training text out of Debian packages: public-domain English, nothing else.

usage: prepare_text.py OUT_FILE

Sources (run `apt-get install bible-kjv-text bible-kjv` first; the second package is only unpacked, not installed):
  bible-kjv-text     King James Version (1611)
  r-cran-janeaustenr six novels of Jane Austen (1811 to 1817), Project Gutenberg's text inside an R data file
OUT_FILE gets one document (chapter) per block, blocks separated by a line holding only "\\f".
"""

import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

STRSXP, CHARSXP = 16, 9  # type codes of R's serialisation format (R internals manual, section 1.8)


def kjv_chapters():
    verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters, current = [], None
    for line in verses.splitlines():
        match = re.match(r"(\w+?)(\d+):(\d+) (.*)", line)
        if not match:
            continue
        chapter = match.group(1, 2)
        if chapter != current:
            chapters.append([])
            current = chapter
        chapters[-1].append(match.group(4).strip())
    return [" ".join(verses) for verses in chapters]


def r_strings(chunk):
    """The longest character vector of one serialised R object."""
    best, at = [], 0
    while (at := chunk.find(struct.pack(">I", STRSXP), at)) >= 0:
        (count,) = struct.unpack_from(">I", chunk, at + 4)
        position, strings = at + 8, []
        while len(strings) < count and position + 8 <= len(chunk):
            flags, length = struct.unpack_from(">II", chunk, position)
            if flags & 0xFF != CHARSXP or length > 10_000:
                break
            strings.append(chunk[position + 8 : position + 8 + length].decode("utf-8", "replace"))
            position += 8 + length
        if len(strings) == count and count > len(best):
            best = strings
        at += 4
    return best


def austen_chapters():
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["apt-get", "download", "r-cran-janeaustenr"], cwd=tmp, check=True, capture_output=True)
        package = next(Path(tmp).glob("*.deb"))
        subprocess.run(["dpkg", "-x", package, tmp], check=True)
        data = (Path(tmp) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    chapters = []
    while data:
        decompressor = zlib.decompressobj()
        chunk = decompressor.decompress(data[4:])  # four bytes of length, then zlib
        data = decompressor.unused_data
        chapters += novel_chapters(r_strings(chunk))
    return chapters


def novel_chapters(lines):
    text = "\n".join(lines)
    parts = re.split(r"\n(?:CHAPTER|Chapter|VOLUME|Volume)[^\n]*\n", text)
    return [paragraphs(part) for part in parts[1:] if len(part) > 2_000]


def paragraphs(text):
    """Hard-wrapped lines become one line a paragraph."""
    joined = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(p.replace("--", " - ").replace("_", "") for p in joined if len(p) > 1)


def main(out):
    documents = kjv_chapters() + austen_chapters()
    text = "\n\f\n".join(documents)
    for fancy, plain in {"“": '"', "”": '"', "‘": "'", "’": "'", "—": " - ", "é": "e", "ê": "e", "è": "e"}.items():
        text = text.replace(fancy, plain)
    Path(out).write_text(text, encoding="utf-8")
    print(f"{len(documents)} documents, {len(text)} characters")


if __name__ == "__main__":
    main(sys.argv[1])
