"""Pictures, boxes, regions."""
