def plot(rows, path):
    pass
