"""Write lightning_mm/report/scripts/vega.js.gz: Vega, Vega-Lite and Vega-Embed of the installed
vl-convert.

Run it after vl-convert is upgraded, whose Vega-Lite the charts are written for. Nothing is downloaded:
vl-convert carries the libraries. Bundling takes seconds, which is why reports do not do it.

Data flow: vl_convert.javascript_bundle -> gzip -> a file of the package.
"""

import gzip
from pathlib import Path

import vl_convert

TARGET = Path(__file__).parent.parent / "lightning_mm" / "report" / "scripts" / "vega.js.gz"


def library() -> str:
    """The bundle as report.html runs it, with the versions it was made of in its first line."""
    versions = f"Vega {vl_convert.get_vega_version()}, Vega-Embed {vl_convert.get_vega_embed_version()}"
    note = f"/* {versions}, Vega-Lite {vl_convert.get_vegalite_versions()[-1]}: see vega.LICENSE */\n"
    return note + vl_convert.javascript_bundle()


if __name__ == "__main__":
    TARGET.write_bytes(gzip.compress(library().encode("utf-8"), 9, mtime=0))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
