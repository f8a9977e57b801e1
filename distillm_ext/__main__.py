"""`python -m distillm_ext`: what this installation is. Needs nothing but torch and NumPy."""

from __future__ import annotations

from distillm_ext.cli.info import info_lines

if __name__ == "__main__":
    print("\n".join(info_lines()))
