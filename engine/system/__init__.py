"""What the operating system gives: files, locks, processes, media. Every byte reaches a disk through here."""
