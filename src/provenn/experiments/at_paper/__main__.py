"""The program of one training over several processes: `python -m provenn.experiments.at_paper FOLDER`."""

import sys
from pathlib import Path

from provenn.experiments.at_paper.program import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
