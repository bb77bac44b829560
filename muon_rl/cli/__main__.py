"""``python -m muon_rl.cli``: the command where its script is not on the path."""

from muon_rl.cli import main

if __name__ == "__main__":
    main()
