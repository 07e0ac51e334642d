"""python site OUT: the pages of nbs/ into OUT/source, and from them the site into OUT/html."""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import book  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    repository = os.environ.get("SITE_REPOSITORY", "https://github.com/klrb/klrb")
    counts = book.build(out / "source", repository)
    print(", ".join(f"{value} {name}" for name, value in counts.items()))
    from sphinx.cmd.build import main as sphinx

    options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(HERE)]
    sys.exit(
        sphinx([*options, "-d", str(out / "doctrees"), str(out / "source"), str(out / "html")])
    )


if __name__ == "__main__":
    main()
