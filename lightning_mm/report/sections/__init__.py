"""The sections of the HTML report, each from the files of a run directory."""
