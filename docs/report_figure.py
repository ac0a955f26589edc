"""Draw docs/figures/report.png: the top of a report, as a browser shows it.

    pyro-vae demo --quick --output demo-output
    python docs/report_figure.py demo-output --output docs/figures

needs Chromium (or Chrome) on the path; the page itself does not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from pyro_vae.evaluation.saved import report_of_files

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1000, 1250  # pixels: the findings, and the first rows of the numbers


def browser() -> str:
    """Return the path of a browser; SystemExit where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"a browser is needed: one of {', '.join(BROWSERS)}")
    return found


def main() -> None:
    """Write the page of a folder of results, and its picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a folder of netCDF files of results")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(report_of_files([options.results]), encoding="utf-8")
        picture = options.output / "report.png"
        # Headless, with a profile of its own, and no scroll bar in the picture.
        command = [browser(), "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}"]
        command += [f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
    print(f"{picture}: {picture.stat().st_size} bytes")


if __name__ == "__main__":
    main()
