def write(workdir):
    return workdir
