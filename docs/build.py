"""Builds the site into docs/_build/html, offline, with warnings as errors, and checks it.

python docs/build.py                              # the whole site
python docs/build.py --only tutorials/vae norms   # these pages alone, to look at them while writing
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from public import MODULES, public_names
from sphinx.util.inventory import InventoryFile

DOCS = Path(__file__).parent
SITE = DOCS / "_build" / "html"
# What a page may load: nothing that is not in the site itself.
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]+)\"[^>]*>")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="PAGE", default=[], help="pages, without their endings")
    parser.add_argument("--jobs", default="auto", help="how many pages at once; default: one a core")
    options = parser.parse_args()
    if options.only:
        return sphinx(DOCS / "_build" / "only", options.jobs, *alone(options.only))
    if status := sphinx(SITE, options.jobs, "-W", "--keep-going"):
        return status
    faults = [*names_left_out(), *loaded_from_elsewhere()]
    print("\n".join(faults) or f"{SITE / 'index.html'}: all public names, nothing from elsewhere")
    return 1 if faults else 0


def sphinx(out: Path, jobs: str, *options: str) -> int:
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-j", jobs, *options, str(DOCS), str(out)]
    environment = os.environ | {
        # `!python` in a page is this one; forking for it, just before another program starts, is no danger.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore:os.fork:RuntimeWarning",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    }
    return subprocess.run(command, env=environment, check=False).returncode


def alone(pages: list[str]) -> list[str]:
    """Options that leave the other pages out, and the links to them unchecked."""
    files = ",".join(f"{page}.md" for page in pages)
    quiet = "myst.xref_missing,toc.not_included,toc.not_readable,toc.excluded,ref.*"
    return [f"-Droot_doc={pages[0]}", f"-Dinclude_patterns={files}", f"-Dsuppress_warnings={quiet}"]


def names_left_out() -> list[str]:
    """Public names without a place in the reference."""
    inventory = InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    there = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    public = (f"{module}.{name}" for module in MODULES for name, _ in public_names(module))
    return [f"{name} is on no page" for name in public if name not in there]


def loaded_from_elsewhere() -> list[str]:
    """Scripts, pictures and styles that a page would fetch from a network."""
    return [
        f"{page.relative_to(SITE)} loads {link}"
        for page in sorted(SITE.rglob("*.html"))
        for link in LOADED.findall(page.read_text())
    ]


if __name__ == "__main__":
    sys.exit(main())
