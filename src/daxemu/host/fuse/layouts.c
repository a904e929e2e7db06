/*
 * Table of layouts: for each file the place of its healthy blocks on the media, its size, and its attributes
 * (fs/layouts.py). host/fuse/layouts.py fills the table, answers.c reads it; both in the event loop's thread.
 */
#include "layouts.h"

#include <stdlib.h>
#include <string.h>

#define BUCKETS 4096
#define MAX_RUNS 4096

static struct layout *table[BUCKETS];

static struct layout **place_of(uint64_t ino)
{
	struct layout **at = &table[ino % BUCKETS];

	while (*at && (*at)->ino != ino)
		at = &(*at)->next;
	return at;
}

struct layout *daxemu_layout_of(uint64_t ino)
{
	return *place_of(ino);
}

void daxemu_layout_break(uint64_t ino)
{
	struct layout **at = place_of(ino), *gone = *at;

	if (gone) {
		*at = gone->next;
		free(gone->runs);
		free(gone);
	}
}

void daxemu_layout_break_all(void)
{
	for (size_t i = 0; i < BUCKETS; i++)
		while (table[i])
			daxemu_layout_break(table[i]->ino);
}

size_t daxemu_run_after(const struct layout *layout, uint64_t byte)
{
	size_t low = 0, high = layout->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (layout->runs[middle].end <= byte)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct layout *found_or_made(uint64_t ino)
{
	struct layout **place = place_of(ino);

	if (!*place && (*place = calloc(1, sizeof(**place))))
		(*place)->ino = ino;
	return *place;
}

/* Stores the attributes with which C may answer GETATTR; has_no_caps: the file has no security.capability. */
void daxemu_layout_attributes(uint64_t ino, const struct fuse_attr_out *attributes, int has_no_caps)
{
	struct layout *layout = found_or_made(ino);

	if (!layout)
		return;
	layout->attributes = *attributes;
	layout->has_attributes = 1;
	layout->has_no_caps = has_no_caps;
}

/* Forgets the attributes of a file: the next GETATTR goes to Python. */
void daxemu_layout_break_attributes(uint64_t ino)
{
	struct layout *layout = daxemu_layout_of(ino);

	if (layout)
		layout->has_attributes = 0;
}

/* Adds a run to a file's layout; the run replaces all runs that it overlaps. Without memory no run is added. */
void daxemu_layout_grant(uint64_t ino, uint64_t size, uint64_t start, uint64_t end, uint64_t at, int may_write)
{
	struct layout *layout = found_or_made(ino);
	size_t first, last;

	if (!layout)
		return;
	layout->size = size;
	if (layout->count == MAX_RUNS)
		layout->count = 0;
	if (layout->count == layout->room) {
		size_t room = layout->room ? 2 * layout->room : 4;
		struct run *grown = realloc(layout->runs, room * sizeof(*grown));

		if (!grown)
			return;
		layout->runs = grown;
		layout->room = room;
	}
	for (first = last = daxemu_run_after(layout, start); last < layout->count && layout->runs[last].start < end; last++)
		;
	memmove(&layout->runs[first + 1], &layout->runs[last], (layout->count - last) * sizeof(struct run));
	layout->count += 1 - (last - first);
	layout->runs[first] = (struct run){start, end, at, may_write};
}
