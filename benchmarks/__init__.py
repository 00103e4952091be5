"""Speed and memory of slimepo beside its peers; every figure is a ratio measured in one run."""
