"""The commands of `embedding-service`, by subject. `cli` puts them together. All heavy imports are late."""
