"""The folders below import ``data_world``: pytest puts the folder of a conftest.py on sys.path."""
