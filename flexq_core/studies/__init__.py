"""One file per notebook: what is measured, and how."""
