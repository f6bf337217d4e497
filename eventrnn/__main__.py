"""`python -m eventrnn`."""

from __future__ import annotations

from eventrnn.cli import main

if __name__ == "__main__":
    main()
