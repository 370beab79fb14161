"""Turns text into training batches: files -> documents -> tokens on disk -> packed sequences -> microbatches.

README.md beside this file explains each step. Import names from the modules, e.g. dtensor_llama.data.reader:
only `reader` needs torch, so the processes that tokenize never spend time on importing it.
"""
