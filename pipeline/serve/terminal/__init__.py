"""A bundle asked in a terminal: one text, or a chat, each token in the colour of its expert."""
