"""Questions with constraints: read from files, encoded, answered and scored."""
