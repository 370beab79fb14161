"""Compressed files as streams of bytes: gzip, zstd with any window, bzip2 and xz, several members or frames
in a row too."""

import contextlib
import io
import shlex
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa

from dtensor_llama.errors import UsageError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# bytes of past text that the library gives a frame; more is written by zstd --long=28 and above
USUAL_WINDOW = 1 << 27
UNPACK_ERRORS = (OSError, EOFError)
with contextlib.suppress(ImportError):  # a Python may be built without it
    from lzma import LZMAError

    UNPACK_ERRORS += (LZMAError,)
with contextlib.suppress(ImportError):
    from zstandard import ZstdError

    UNPACK_ERRORS += (ZstdError,)
NEEDS_WINDOW = "requires too much memory"  # what the library says of a frame that has a larger one


def open_compressed(path: Path, file, compression: str | None):
    """What `file`, opened for bytes, holds, unpacked: an object with read(n). UsageError if nothing here can
    unpack it."""
    if compression is None:
        return file
    if compression in ("bz2", "xz"):
        return _open_with_python(path, file, compression)
    if compression == "zstd" and _zstd_window(file) > USUAL_WINDOW:
        return _open_long_zstd(path, file)
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression)


def say_long_window(path: Path) -> UsageError:
    return UsageError(
        f"--data.path {path}: compressed with zstd --long, so that unpacking it needs more "
        "memory than usual, for which the package zstandard or the program zstd is needed; "
        "install one of them (pip install zstandard), or write the file anew: zstd -dc "
        f"--long=31 {shlex.quote(path.name)} | zstd -o another.zst."
    )


def _open_with_python(path: Path, file, compression: str):
    try:
        if compression == "bz2":
            import bz2

            return bz2.open(file)
        import lzma

        return lzma.open(file)
    except ImportError:
        program = {"bz2": "bzip2", "xz": "xz"}[compression]
        raise UsageError(
            f"--data.path {path}: this Python was built without {compression}; unpack the file "
            f"with {program} -d, or use another Python."
        ) from None


def _zstd_window(file) -> int:
    """Bytes of window that the first frame asks for (RFC 8878, section 3.1.1); 0 if it is no ordinary
    frame."""
    head = file.read(14)
    file.seek(0)
    if len(head) < 6 or not head.startswith(ZSTD_MAGIC):
        return 0
    descriptor = head[4]
    # one segment: the window is as large as the content
    if descriptor & 0x20:
        at = 5 + (0, 1, 2, 4)[descriptor & 3]
        n_bytes = (1, 2, 4, 8)[descriptor >> 6]
        return int.from_bytes(head[at : at + n_bytes], "little") + (256 if n_bytes == 2 else 0)
    base = 1 << (10 + (head[5] >> 3))
    return base + base // 8 * (head[5] & 7)


def _open_long_zstd(path: Path, file):
    try:
        import zstandard
    except ImportError:
        if shutil.which("zstd") is None:
            raise say_long_window(path) from None
        return _ZstdProgram(path)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(file, read_across_frames=True)


class _ZstdProgram(io.RawIOBase):
    """What the program zstd unpacks."""

    def __init__(self, path: Path):
        command = ["zstd", "-dcq", "--long=31", "--", str(path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def read(self, n_bytes: int = -1) -> bytes:
        data = self.process.stdout.read(n_bytes)
        if (not data or n_bytes < 0) and self.process.poll() != 0:
            said = self.process.stderr.read().decode(errors="replace")
            if self.process.wait() != 0:
                raise OSError(said.strip() or f"zstd ended with status {self.process.returncode}")
        return data

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        super().close()
