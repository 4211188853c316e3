"""What training costs, measured against what it cannot do without and against its peers: `make bench`."""
