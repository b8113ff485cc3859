"""The page of a cluster: a WSGI application and the files that a browser gets."""
