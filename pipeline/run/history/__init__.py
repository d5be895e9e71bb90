"""What runs did, from the histories of a store: listed, shown, compared, exported, drawn."""
