"""`python -m eventrnn.cli`, the same program as `python -m eventrnn`, for scripts that call it so."""

from __future__ import annotations

from eventrnn.cli import main

if __name__ == "__main__":
    main()
