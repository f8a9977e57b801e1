"""Runs one stage: `python -m device NAME`, as the runner does."""

from __future__ import annotations

import importlib
import sys

from .plan import NO_DEVICE, SKIPPED
from .stage import Check, NoDevice, Skipped


def main(name: str) -> int:
    check = Check.from_environment()
    try:
        importlib.import_module(f"device.stages.{name}").run(check)
    except Skipped as reason:
        check.record("stage", skipped=str(reason))
        return SKIPPED
    except NoDevice as reason:
        print(f"no device: {reason}", flush=True)
        return NO_DEVICE
    return check.status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
