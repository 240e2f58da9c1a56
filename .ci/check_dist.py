"""What a wheel and an sdist hold is what belongs there, no more and no less.

python .ci/check_dist.py dist/jaxreg-*.whl dist/jaxreg-*.tar.gz
"""

import subprocess
import sys
import tarfile
import zipfile

IN_SDIST = ("jaxreg", "tests", "benchmarks", "examples", "docs")
BESIDE = ("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")
MADE = {"PKG-INFO", ".gitignore"}  # by the builder


def main(paths: list[str]) -> int:
    """Print what is wrong; the exit status is 0 where nothing is."""
    tracked = subprocess.check_output(["git", "ls-files"], text=True).splitlines()
    package = {path for path in tracked if path.startswith("jaxreg/")}
    source = {path for path in tracked if path.split("/")[0] in IN_SDIST} | {*BESIDE, "pyproject.toml"}
    faults = []
    for path in paths:
        if path.endswith(".whl"):
            names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
            expected = package
        else:
            with tarfile.open(path) as archive:
                names = {member.name.partition("/")[2] for member in archive if member.isfile()} - MADE
            expected = source
        faults += [f"{path}: {name} does not belong" for name in sorted(names - expected)]
        faults += [f"{path}: {name} is missing" for name in sorted(expected - names)]
        print(f"{path}: {len(names)} files")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
