"""Where things are that no package holds."""

from pathlib import Path

SUPPORT = Path(__file__).parent  # what other processes import, such as the host functions
ROOT = SUPPORT.parent.parent
EXAMPLES = ROOT / "examples"
