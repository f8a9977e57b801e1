"""Objects of the row kernels: what the linker may merge with another file's lives in the instruction set's namespace.

    instruction_sets.py NM OBJECT...

An inline function outside of it that was compiled under the target pragma would reach processors that lack the
instructions (csrc/cpu/instruction_sets/row_kernel_list.h). For optimised objects: without optimisation small
functions of the standard library, which are those of the default target, stand in every object.
"""

import re
import subprocess
import sys
from pathlib import Path


def strangers(nm: str, path: str, namespace: str) -> list[str]:
    """Symbols of the object, other than local ones, that do not name the namespace."""
    command = [nm, "--defined-only", "--extern-only", "--demangle", path]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if not re.search(rf"\b(row_kernels_)?{namespace}\b", line)]


def main(nm: str, *objects: str) -> int:
    sets = {path: match[1] for path in objects if (match := re.match(r"row_kernels_(\w+)\.", Path(path).name))}
    if "generic" not in sets.values():
        raise SystemExit(f"no object of row_kernels_generic.cpp among {objects}")
    found = {path: strangers(nm, path, name) for path, name in sets.items() if name != "generic"}
    for path, lines in found.items():
        for line in lines:
            print(f"{path}: outside of its namespace: {line}")
    print(f"instruction_sets: {len(found)} objects, {sum(map(len, found.values()))} failures")
    return any(found.values())


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
