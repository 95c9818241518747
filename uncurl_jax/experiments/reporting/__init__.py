"""Reports: JSON for programs, a page with pictures for people."""
