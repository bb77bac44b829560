"""``python -m muon_rl.cli``: the command where its script is not on the path."""

from muon_rl.cli import main
from muon_rl.experiments.launch import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
