"""Everything that only a GPU can show, in one call: correctness, times against the card's own ceilings, tools.

    python3 benchmarks/device_check.py                         # stages in their order, as far as 285 s reach
    python3 benchmarks/device_check.py --state DIR/state.json  # the rest: what passed in DIR is not run again
    python3 benchmarks/device_check.py --device cpu            # rehearsal at toy sizes, no GPU needed

Needs no network, no installation and no make: Python with torch, and nvcc where the libraries are not there yet. Every
result is on the disk the moment it is there, so a run that is cut loses nothing. docs/device_check.md says what each
stage tells and what to look at first.

Exit status: 0 all passed, 1 something failed, 2 no GPU or no CUDA kernels, 3 stages left undone; 64 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # nothing is installed on such a machine

from device.book import Book, sources_key  # noqa: E402
from device.plan import STAGES  # noqa: E402
from device.runner import EXIT_NO_DEVICE, Runner  # noqa: E402

EXIT_USAGE = 64


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """argparse's own 2 means here that there is no GPU."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def _stages(text: str) -> list[str]:
    known, names = [stage.name for stage in STAGES], [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no stage; there are {', '.join(known)}")
    return names


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or str(ROOT / "build" / "device")
    parser.add_argument("--out", type=Path, default=Path(default), help="folder of the results, $OUT or build/device")
    parser.add_argument("--stages", type=_stages, help=f"some of {','.join(stage.name for stage in STAGES)}")
    parser.add_argument("--limit", type=_seconds, default=285.0, help="seconds for everything")
    parser.add_argument("--state", type=Path, help="state.json of an earlier call: what passed there is not run again")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at toy sizes")
    return parser.parse_args(arguments)


def device_kind(device: str) -> str:
    """The card's name too: figures of two cards do not belong in one table."""
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if device != "cuda" or shutil.which(query[0]) is None:
        return device
    try:
        return f"{device} {subprocess.run(query, capture_output=True, text=True, timeout=10, check=False).stdout}"
    except subprocess.TimeoutExpired:
        return device


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    chosen = [stage for stage in STAGES if stage.always or options.stages is None or stage.name in options.stages]
    try:
        book = Book(options.out, sources_key(ROOT, device_kind(options.device)), options.state)
    except PackageNotFoundError:
        print(f"no torch for {sys.executable}: start this with the Python that has it", file=sys.stderr)
        return EXIT_NO_DEVICE
    except OSError as error:
        print(f"--out {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    book.log.line(book.news)
    return Runner(chosen, book, options.limit, options.device).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
