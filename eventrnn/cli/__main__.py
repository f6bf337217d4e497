"""`python -m eventrnn.cli`."""

from eventrnn.cli import main

if __name__ == "__main__":
    main()
