/*
 * The guest's workload `files`: one new file after the other into mounted file systems, each of 256 lines with its
 * number (ext4.py). Started by init.sh as `files FOLDER...`: file 1 goes into each folder, then file 2 and so on.
 * `rate` (numbers per second, 0 = as fast as it goes) comes from the kernel command line, as environment.
 * Once a number is synced in all folders, it is told on the serial console: any later backup must hold it. A file
 * that took more than 200 ms is told, too; on an error the workload ends.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define LINES 256
#define LINE 16
#define STALL_US 200000

static long long now_us(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000ll + ts.tv_nsec / 1000;
}

static void fatal(const char *what, const char *which)
{
	printf("VMF fatal reason=%s what=%s errno=%d\n", what, which, errno);
	exit(2);
}

static void write_file(const char *folder, unsigned number)
{
	char path[256], content[LINES * LINE + 1];
	snprintf(path, sizeof path, "%s/%u", folder, number);
	for (int i = 0; i < LINES; i++)
		snprintf(content + i * LINE, LINE + 1, "%015u\n", number);
	int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
	if (fd < 0 && errno == EEXIST) /* written before the guest was started again */
		return;
	if (fd < 0 || write(fd, content, LINES * LINE) != LINES * LINE || fsync(fd) || close(fd))
		fatal("cannot-write", path);
}

int main(int argc, char **argv)
{
	const char *rate_text = getenv("rate");
	long rate = rate_text ? atol(rate_text) : 0;
	setvbuf(stdout, NULL, _IOLBF, 0); /* lines stay whole */
	for (unsigned number = 1;; number++) {
		long long begun = now_us();
		for (int i = 1; i < argc; i++) {
			long long start = now_us();
			write_file(argv[i], number);
			long long us = now_us() - start;
			if (us > STALL_US)
				printf("VMF stall us=%lld folder=%s\n", us, argv[i]);
		}
		printf("VMF synced file=%u\n", number);
		if (number == 1)
			printf("VMF ready\n");
		long long left_us = rate ? begun + 1000000 / rate - now_us() : 0;
		if (left_us > 0)
			usleep(left_us);
	}
}
