/*
 * The guest's workload: writes to its disks, checks each result, and says in its own words, on
 * the serial console, what was done to it. Started by init.sh as `writer KIND DEVICE...`; all
 * other parameters come from the kernel command line, which the kernel hands on as environment:
 *   rate       writes per second over all disks, 0 = as fast as it goes
 *   region     only the first so many bytes of each disk are written, 0 = all
 *   odirect    1: O_DIRECT, no flush; 0: page cache, fdatasync after each write
 *   blocksize  of the random writer, in bytes
 *   skew       so many percent of the random writer's writes go to the last fifth of the region
 *   sweep      1: the random writer goes over the region from start to end, again and again
 *   run        number of this run, in each record
 *   again      1: go on behind the newest record of this run
 *   nudge      read a sector of each disk every so many milliseconds, 0 = never (see nudge())
 * An error is printed at once, counted, and the same write repeated: the order of the writes is
 * what the oracle (sequence.py) stands on, so the writer never goes on past a failed one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define RECORD 4096
#define STRIDE 7919
#define SECTOR 512
#define MAX_DISKS 4
#define POOL (4u << 20)
#define SECOND 1000000000ull
#define STALL (200 * 1000000ull)

struct record { /* mirrored in sequence.py */
	char magic[8];
	uint64_t run, seq;
	uint32_t disk, disks;
	uint64_t slot, slots, ns;
	uint32_t crc, zero;
	uint64_t body[(RECORD - 64) / 8];
};
_Static_assert(sizeof(struct record) == RECORD, "a record is one 4 KiB block");

struct disk {
	int fd;
	uint64_t bytes; /* that may be written */
	uint64_t blocks, next;
};

static struct disk disks[MAX_DISKS];
static int ndisks;
static uint64_t rate, region, blocksize, skew, sweep, run, resume, odirect, nudge_ms;
static uint64_t writes, errors, due, next_stat, begun;

/* Latencies of the current interval: 32 buckets an octave of microseconds, so within 3 %. */
static uint32_t histogram[32 * 40];
static uint64_t samples, total_us, max_us;

static uint64_t now(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * SECOND + ts.tv_nsec;
}

static void say(const char *format, ...)
{
	char line[256];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	line[n++] = '\n';
	if (write(1, line, n) != n)
		_exit(3);
}

static void fatal(const char *what, const char *which)
{
	say("VMF fatal reason=%s what=%s errno=%d", what, which, errno);
	exit(2);
}

static uint64_t parameter(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);
	return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

static uint64_t random_state;
static uint64_t random64(void) /* xorshift64* */
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return random_state * 0x2545F4914F6CDD1Dull;
}

/* CRC-32 as in zlib, eight bytes at a time. */
static uint32_t table[8][256];
static void crc_init(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0xEDB88320u : c >> 1;
		table[0][i] = c;
	}
	for (int t = 1; t < 8; t++)
		for (int i = 0; i < 256; i++)
			table[t][i] = table[0][table[t - 1][i] & 255] ^ table[t - 1][i] >> 8;
}

static uint32_t crc_record(struct record *r)
{
	uint32_t crc = ~0u, kept = r->crc;
	r->crc = 0;
	for (int i = 0; i < RECORD / 8; i++) {
		uint64_t w;
		memcpy(&w, (const char *)r + 8 * i, 8);
		w ^= crc;
		crc = table[7][w & 255] ^ table[6][w >> 8 & 255] ^ table[5][w >> 16 & 255] ^
		      table[4][w >> 24 & 255] ^ table[3][w >> 32 & 255] ^
		      table[2][w >> 40 & 255] ^ table[1][w >> 48 & 255] ^ table[0][w >> 56];
	}
	r->crc = kept;
	return ~crc;
}

static int bucket_of(uint64_t us)
{
	int octave = 0;
	while (us >> octave >= 64)
		octave++;
	return octave * 32 + (us >> octave);
}

static uint64_t percentile(unsigned percent)
{
	uint64_t rank = (samples * percent + 99) / 100, seen = 0;
	for (int i = 0; i < 32 * 40; i++) {
		seen += histogram[i];
		if (seen >= rank && seen)
			return i < 64 ? (uint64_t)i : (uint64_t)(32 + i % 32) << (i / 32 - 1);
	}
	return 0;
}

static void tell_statistics(uint64_t t)
{
	if (t < next_stat)
		return;
	say("VMF stat t=%.3f writes=%llu errors=%llu p50_us=%llu p99_us=%llu max_us=%llu mean_us=%llu",
	    (t - begun) / 1e9, (unsigned long long)writes, (unsigned long long)errors,
	    (unsigned long long)percentile(50), (unsigned long long)percentile(99),
	    (unsigned long long)max_us, (unsigned long long)(samples ? total_us / samples : 0));
	memset(histogram, 0, sizeof histogram);
	samples = total_us = max_us = 0;
	next_stat += SECOND;
	if (next_stat < t) /* stalled for longer */
		next_stat = t + SECOND;
}

static void sleep_until(uint64_t t)
{
	struct timespec ts = { .tv_sec = t / SECOND, .tv_nsec = t % SECOND };
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR)
		;
}

static void pace(void)
{
	uint64_t t = now();
	if (rate) {
		due += SECOND / rate;
		if (due + SECOND < t) /* never catch up with a burst after a stall */
			due = t;
		while (t < due) {
			sleep_until(due < next_stat ? due : next_stat);
			t = now();
			tell_statistics(t);
		}
	}
	tell_statistics(t);
}

static void put(struct disk *d, const void *data, size_t length, uint64_t offset)
{
	for (;;) {
		uint64_t start = now();
		errno = 0;
		int ok = pwrite(d->fd, data, length, offset) == (ssize_t)length &&
			 (odirect || fdatasync(d->fd) == 0);
		/* The clock of a guest whose QEMU was stopped for long (SIGSTOP) may come back behind where it was. */
		uint64_t end = now(), us = end > start ? (end - start) / 1000 : 0;
		if (us > STALL / 1000)
			say("VMF stall us=%llu disk=%d", (unsigned long long)us, (int)(d - disks));
		if (ok) {
			histogram[bucket_of(us)]++;
			samples++;
			total_us += us;
			if (us > max_us)
				max_us = us;
			if (writes++ == 0)
				say("VMF ready");
			pace();
			return;
		}
		errors++;
		say("VMF error errno=%d disk=%d offset=%llu length=%llu", errno, (int)(d - disks),
		    (unsigned long long)offset, (unsigned long long)length);
		sleep_until(now() + SECOND / 20);
		tell_statistics(now());
	}
}

static uint64_t slots_of(const struct disk *d)
{
	uint64_t slots = d->bytes / RECORD;
	return slots % STRIDE == 0 && slots ? slots - 1 : slots; /* the stride must reach all slots */
}

static uint64_t newest_on(struct disk *d, int number, struct record *r)
{
	uint64_t newest = 0;
	for (uint64_t slot = 0; slot < slots_of(d); slot++) {
		if (pread(d->fd, r, RECORD, slot * RECORD) != RECORD)
			fatal("cannot-read", "disk");
		if (!memcmp(r->magic, "VMFSEQ01", 8) && r->run == run && r->slot == slot &&
		    r->disk == (uint32_t)number && r->seq > newest && r->crc == crc_record(r))
			newest = r->seq;
	}
	return newest;
}

static void write_sequence(struct record *r)
{
	uint64_t seq = 1;
	if (resume) {
		seq = UINT64_MAX;
		for (int i = 0; i < ndisks; i++) {
			uint64_t newest = newest_on(&disks[i], i, r);
			seq = newest + 1 < seq ? newest + 1 : seq;
		}
	}
	for (;; seq++) {
		random_state = (run ^ seq * 0x9E3779B97F4A7C15ull) | 1;
		for (size_t i = 0; i < sizeof r->body / 8; i++)
			r->body[i] = random64();
		for (int i = 0; i < ndisks; i++) {
			memcpy(r->magic, "VMFSEQ01", 8);
			r->run = run;
			r->seq = seq;
			r->disk = i;
			r->disks = ndisks;
			r->slots = slots_of(&disks[i]);
			r->slot = (seq - 1) % r->slots * STRIDE % r->slots;
			r->ns = now();
			r->crc = r->zero = 0;
			r->body[0] ^= i + 1;
			r->crc = crc_record(r);
			put(&disks[i], r, RECORD, r->slot * RECORD);
		}
	}
}

/* Half of each 4 KiB is random, the other half constant. Each write starts somewhere else in the
 * pool and carries a number in each 4 KiB, so that no two writes have the same content. */
static void write_random(unsigned char *pool)
{
	uint64_t number = 0;
	random_state = run | 1;
	for (size_t i = 0; i < POOL; i += 8) {
		uint64_t value = i % 4096 < 2048 ? random64() : 0x20202020666D7620ull;
		memcpy(pool + i, &value, 8);
	}
	for (;;) {
		for (int i = 0; i < ndisks; i++) {
			struct disk *d = &disks[i];
			uint64_t which = random64(), block = which % d->blocks;
			if (sweep)
				block = d->next++ % d->blocks;
			else if (random64() % 100 < skew)
				block = d->blocks - 1 - block % ((d->blocks + 4) / 5);
			else if (which >> 59 == 0) /* one in 32: up to the very last sector */
				block = d->blocks - 1;
			uint64_t offset = block * blocksize, left = d->bytes - offset;
			size_t length = left < blocksize ? left : blocksize;
			unsigned char *data = pool + random64() % ((POOL - length) / SECTOR + 1) * SECTOR;
			for (size_t at = 0; at < length; at += 4096) {
				number++;
				memcpy(data + at, &number, 8);
			}
			put(d, data, length, offset);
		}
	}
}

/* QEMU 10.0 loses the interrupt of a write that completes in an iothread while the VM is being
 * paused: the guest would wait for ever. The interrupt of any later request on that disk makes the
 * driver look at the write, too, if the device runs without event_idx. */
static void *nudge(void *argument)
{
	struct disk *d = argument;
	void *sector;
	if (posix_memalign(&sector, 4096, SECTOR))
		fatal("memory", "nudge");
	for (;;) {
		usleep(nudge_ms * 1000);
		if (pread(d->fd, sector, SECTOR, 0) != SECTOR)
			continue; /* the writer meets errors itself */
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc < 3 || argc - 2 > MAX_DISKS)
		fatal("usage", "writer");
	rate = parameter("rate", 0);
	region = parameter("region", 0);
	blocksize = parameter("blocksize", 65536);
	skew = parameter("skew", 0);
	sweep = parameter("sweep", 0);
	run = parameter("run", 1);
	resume = parameter("again", 0);
	odirect = parameter("odirect", 1);
	nudge_ms = parameter("nudge", 0);
	if (blocksize == 0 || blocksize % SECTOR || blocksize > POOL)
		fatal("blocksize", "writer");
	crc_init();
	for (ndisks = 0; ndisks < argc - 2; ndisks++) {
		struct disk *d = &disks[ndisks];
		d->fd = open(argv[ndisks + 2], O_RDWR | O_CLOEXEC | (odirect ? O_DIRECT : 0));
		if (d->fd < 0 || ioctl(d->fd, BLKGETSIZE64, &d->bytes))
			fatal("cannot-open", argv[ndisks + 2]);
		if (region && region < d->bytes)
			d->bytes = region / SECTOR * SECTOR;
		if (d->bytes < RECORD)
			fatal("too-small", argv[ndisks + 2]);
		d->blocks = (d->bytes + blocksize - 1) / blocksize;
		pthread_t thread;
		if (nudge_ms && pthread_create(&thread, NULL, nudge, d))
			fatal("thread", "nudge");
	}
	void *memory;
	if (posix_memalign(&memory, 4096, POOL))
		fatal("memory", "writer");
	begun = due = now();
	next_stat = begun + SECOND;
	if (!strcmp(argv[1], "sequence"))
		write_sequence(memory);
	if (!strcmp(argv[1], "random"))
		write_random(memory);
	fatal("unknown-workload", argv[1]);
}
