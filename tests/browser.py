"""A headless Chromium, found on this machine or installed."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip


def find():
    """The path of a Chromium: $CHROMIUM, one on the PATH or Playwright's own; None if there is
    none.
    """
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or (own if Path(own).exists() else None)


def install():
    """From Debian where that is allowed, else Playwright's."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], check=True
        )
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


@contextmanager
def page(**options):
    """A page of a fresh browser. options: of Playwright's `new_page`. What goes wrong in it fails
    the test.
    """
    path = find() or (install(), find())[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(**options)
        failures = []
        page.on("pageerror", lambda error: failures.append(error))
        yield page
        browser.close()
        assert not failures, failures
