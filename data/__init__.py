"""Makes this directory a package: without this file, an installed package named data would hide it."""
