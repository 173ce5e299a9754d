"""TFRecord files without TensorFlow: where each record lies, and its bytes, checked.

The file may be gzip'd as a whole (tensorflow/core/lib/io/record_writer.h says so). Records are counted from 0.
"""

from __future__ import annotations

import array
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from edge_serve.errors import UsageError
from edge_serve_converters.record_framing import FOOTER, HEADER, is_header, masked_crc32c

# One sample; longer than the longest recording or picture that a device would take.
MAX_RECORD_BYTES = 256 * 2**20
MAX_RECORDS = 20_000_000
_GZIP_MAGIC = b"\x1f\x8b\x08"


class RecordFile:
    """One TFRecord file. Opening it reads the lengths only (of a gzip'd one everything is unpacked, and nothing kept)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array.array("Q")
        self._packed = False
        with self._reading(), path.open("rb") as stream:
            head = stream.read(HEADER.size)
            self._packed = head.startswith(_GZIP_MAGIC) and not is_header(head)
        with self._open() as stream:
            self._index(stream)

    def __len__(self) -> int:
        return len(self._offsets)

    def _index(self, stream: BinaryIO) -> None:
        offset = 0
        while head := stream.read(HEADER.size):
            where = f"{self.path}, record {len(self._offsets)}"
            if len(head) < HEADER.size:
                raise UsageError(f"{where}: the file ends within it; copy or write the file again")
            length, _ = HEADER.unpack(head)
            if not is_header(head):
                what = "is no TFRecord file" if not self._offsets else "is damaged here"
                raise UsageError(f"{where}: {what}, the checksum of the length does not fit; write the file again")
            if length > MAX_RECORD_BYTES:
                raise UsageError(
                    f"{where}: has {length} bytes; at most {MAX_RECORD_BYTES} are read, one sample a record"
                )
            stream.seek(length, 1)
            if len(stream.read(FOOTER.size)) < FOOTER.size:
                raise UsageError(f"{where}: the file ends within it; copy or write the file again")
            if len(self._offsets) == MAX_RECORDS:
                raise UsageError(
                    f"{self.path}: holds more than {MAX_RECORDS} records; a few thousand calibrate as well"
                )
            self._offsets.append(offset)
            offset += HEADER.size + length + FOOTER.size

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Give (number, bytes) of records, whose numbers ascend; UsageError names one whose bytes are not as written."""
        with self._open() as stream:
            for number in numbers:
                stream.seek(self._offsets[number])
                length, _ = HEADER.unpack(stream.read(HEADER.size))
                payload = stream.read(length)
                footer = stream.read(FOOTER.size)
                if len(footer) < FOOTER.size or FOOTER.unpack(footer)[0] != masked_crc32c(payload):
                    raise UsageError(
                        f"{self.path}, record {number}: is damaged, the checksum of its bytes does not fit; write the file again"
                    )
                yield number, payload

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with self._reading():
            if not self._packed:
                with self.path.open("rb") as stream:
                    yield stream
                return
            with gzip.open(self.path, "rb") as packed:
                yield cast(BinaryIO, packed)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            where = f", after record {len(self._offsets) - 1}" if self._offsets else ""
            raise UsageError(f"{self.path}{where}: cannot be read ({error})") from error
