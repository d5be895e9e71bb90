"""What is kept: artifacts, bundles, histories."""
