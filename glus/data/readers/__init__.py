"""One reader per family of expression files; ``glus.data.index`` has the table of which layout is whose."""
