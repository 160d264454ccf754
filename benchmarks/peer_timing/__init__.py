"""Times implementations of KDA beside each other on one device; ../peers.py is its command line.

Every competitor runs in a process of its own (worker.py), so that two packages of one name can be compared.
The parent (race.py) imports neither PyTorch nor a competitor: it asks the workers in turn, one JSON object a
line.
"""
