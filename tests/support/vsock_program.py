"""A program for guests that have no other way to speak vsock, linked statically."""

from __future__ import annotations

import subprocess
from pathlib import Path

# vs connect PORT | vs listen PORT: standard input goes to the peer, what comes to standard output.
SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static void copy(int from, int to)
{
    static char buffer[65536];
    ssize_t got;

    while ((got = read(from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0, put; done < got; done += put)
            if ((put = write(to, buffer + done, got - done)) <= 0)
                exit(3);
    if (got < 0)
        exit(4);
}

int main(int argc, char **argv)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK };
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    int listens = argc == 3 && !strcmp(argv[1], "listen");

    if (argc != 3 || fd < 0)
        return 2;
    address.svm_port = atoi(argv[2]);
    address.svm_cid = listens ? VMADDR_CID_ANY : VMADDR_CID_HOST;
    if (listens) {
        if (bind(fd, (void *)&address, sizeof address) || listen(fd, 1))
            return 5;
        if ((fd = accept(fd, NULL, NULL)) < 0)
            return 6;
    } else if (connect(fd, (void *)&address, sizeof address)) {
        perror("connect");
        return 7;
    }
    if (fork() == 0) {
        copy(0, fd);
        return shutdown(fd, SHUT_WR);
    }
    copy(fd, 1);
    int status;
    wait(&status);
    return status;
}
"""


def build(path: Path) -> None:
    """Compile it to `path`."""
    source = path.with_suffix(".c")
    source.write_text(SOURCE)
    subprocess.run(["cc", "-static", "-O1", "-o", str(path), str(source)], check=True, timeout=60)
    source.unlink()
