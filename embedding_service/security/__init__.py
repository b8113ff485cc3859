"""Who may do what: certificates, tokens, the policy file, and signed routings (docs/security.md).

The client's side uses `access`, `proofs` and `routing`. The rest is a server's.
"""
