"""Where rows and documents are read from: one file a kind of source."""
