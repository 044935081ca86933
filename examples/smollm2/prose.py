# SPDX-License-Identifier: Apache-2.0
"""English prose in the public domain, from three Debian packages.

    python examples/smollm2/prose.py OUT.txt.xz [--debs FOLDER]

Jane Austen's novels (`r-cran-janeaustenr`), the Jargon File (`jargon-text`) and The
Devil's Dictionary (`dict-devil`): 5 MB of text. `--debs` names a folder with the
packages; without it, `apt-get download` fetches them (Debian or Ubuntu).

The output is one document per paragraph block, separated by form feeds, in a seeded
order, so that any cut of it mixes the sources.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import random
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("r-cran-janeaustenr", "jargon-text", "dict-devil")
BREAK = "\f"
DOCUMENT_CHARACTERS = 1200


def read(path: Path) -> list[str]:
    """Documents of a file that `write` made."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read().split(BREAK)


def write(path: Path, documents: list[str]) -> None:
    """Write documents as one compressed text."""
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        file.write(BREAK.join(documents))


def collect(debs: Path) -> list[str]:
    """Documents of about `DOCUMENT_CHARACTERS` from the packages in `debs`."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in PACKAGES:
            deb = next(debs.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(deb), scratch], check=True)
        texts = list(_austen(_only(scratch, "**/janeaustenr/data/Rdata.rdb")))
        for pattern in ("**/jargon.txt.gz", "**/devil.dict.dz"):
            raw = gzip.decompress(_only(scratch, pattern).read_bytes())
            texts.append(raw.decode("utf-8", "replace"))
    documents = [d for text in texts for d in _documents(text)]
    random.Random(0).shuffle(documents)
    return documents


def _only(folder: str, pattern: str) -> Path:
    (found,) = Path(folder).glob(pattern)
    return found


def _austen(path: Path) -> Iterator[str]:
    """Texts in an R lazy-load database: character vectors of lines.

    Each chunk is a big-endian length and a zlib stream of R's XDR serialisation, in
    which a character vector is type 16, its length, then strings of type 9.
    """
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        chunk = stream.decompress(data[4:])
        data = stream.unused_data
        start = chunk.find(b"\x00\x00\x00\x10")
        if start >= 0:
            yield "\n".join(_strings(chunk, start + 4))


def _strings(chunk: bytes, at: int) -> Iterator[str]:
    (count,) = struct.unpack_from(">i", chunk, at)
    at += 4
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", chunk, at)
        if flags & 0xFF != 9:
            return
        yield chunk[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length


def _documents(text: str) -> Iterator[str]:
    """Consecutive paragraphs, unwrapped, joined up to the wanted length.

    Only paragraphs that read as prose count: several words, mostly lower case.
    """
    block: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        letters = sum(c.islower() or c == " " for c in line)
        if len(line) < 80 or letters < 0.8 * len(line):
            continue
        block.append(line)
        if sum(map(len, block)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(block)
            block = []


def main() -> None:
    """Make the compressed text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--debs", type=Path, help="folder that holds the packages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.debs is None:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=scratch, check=True)
        documents = collect(options.debs or Path(scratch))
    write(options.out, documents)
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
