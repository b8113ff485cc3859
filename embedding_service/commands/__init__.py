"""The commands of `embedding-service`, by what they work on; `cli` puts them together. All heavy imports are late."""
