"""One edit from end to end: settings, inputs, loading, encoding, the loop, decoding, the report.

The only package that puts the others together; `api` is its public face.
"""
