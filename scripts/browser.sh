#!/usr/bin/env bash
# Chromium for tests/report/test_browser.py: installed by apt where it is missing and this user may install it.
# Elsewhere one line says that these tests are skipped; where CI is set, they fail.
set -euo pipefail
if command -v chromium > /dev/null || command -v chromium-browser > /dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing Chromium (once)"
    if apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null; then exit 0; fi
fi
echo "no Chromium, and it cannot be installed here: tests/report/test_browser.py is skipped" >&2
[ -z "${CI:-}" ]
