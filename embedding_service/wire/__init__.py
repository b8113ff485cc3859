"""The contract as Python: generated from protos/embedding/v1 by `make proto`; do not edit."""
