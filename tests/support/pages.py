"""Where the pages of the documentation and its programs are, and which of the guides' blocks are part of a program."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = DOCS / "pages"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def blocks_in_examples() -> dict[str, Path]:
    """Blocks of guides.md that a program of docs/examples/ contains as they are."""
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / "guides.md").read_text(), re.DOTALL)
    found = {block: [path for path in EXAMPLES if f"\n\n{block}" in path.read_text()] for block in blocks}
    return {block: path for block, paths in found.items() for path in paths}
