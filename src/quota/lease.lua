-- The timetable of one source in Redis: the same steps as src/quota/timetable.rs, one call per lease.
--
-- KEYS[1]  weir:quota:{<source>}; all other keys begin with it, so that a cluster keeps them together
-- ARGV[1]  what to do: configure | accounts | lease | hold | holds | pace | remember
-- ARGV[2]  the server's run id as this connection learned it: another one in the state = restart or failover
-- ARGV[3]  its arguments, as JSON
--
-- All others wait while this runs: no call looks at more than some hundred accounts, however many there are. The plan
-- comes in pieces, and so does what is asked of all accounts; what has to be done to all of them is done by a pass, a piece
-- in each call. While accounts are doubted, or a plan is half written, nobody gets slots.
--
-- :meta     what concerns the whole source (MessagePack)
-- :account  name -> MessagePack {gate, address, home, fallbacks, held, disabled, why, since, released}
-- :queue:A  names of the accounts of address A by the time at which they may call next; disabled ones at +inf
-- :returned slots that came back, "time:number:name", by time
-- :runs     who has slots soon: "first:count:worker" by the time of the last. Only a hint: slots are in workers' hands
--
-- Times are microseconds since 1970 by this server's clock. They are written with %.0f, since Lua's own way
-- keeps 14 digits of 16.

local floor, max, min = math.floor, math.max, math.min
local INFINITE = 9e15
-- A clock that was set back by less is waited for. By more: the state is of a clock that had leapt ahead.
local LEAP = 10000000
-- For so long nobody calls in a state that was made without knowledge of the past: whoever has some is told, and answers.
local TELL = 5000000
-- So many accounts a call of a pass looks at, and so many if it has nothing else to do.
local PIECE, PIECE_ALONE = 40, 80
-- Who writes a plan and is not heard of for so long has died over it.
local LOADING = 1000000
-- What tells the name of an address from an account's, which cannot begin like this.
local ADDRESS = '\n'
local META, ACCOUNT, RETURNED = KEYS[1] .. ':meta', KEYS[1] .. ':account', KEYS[1] .. ':returned'
local RUNS = KEYS[1] .. ':runs'
local function queue(address) return KEYS[1] .. ':queue:' .. address end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local run, input = ARGV[2], cjson.decode(ARGV[3])

local function digits(at)
  if at >= INFINITE then return '+inf' end
  return string.format('%.0f', at)
end

-- ---------------------------------------------------------------- budgets (budget.rs)

-- What concerns the whole source, once it is loaded.
local meta

-- The windows of a calendar (civil.rs): number of the first, when it begins, and how long each is, stretch by stretch.
local function stretch_of_windows(budget, place, value)
  local steps = budget.calendar and meta.calendars and meta.calendars[budget.calendar]
  if not steps then return nil end
  local i = 1
  while steps[i + 3 + place] and steps[i + 3 + place] <= value do i = i + 3 end
  return steps[i], steps[i + 1], steps[i + 2]
end

local function index_of(budget, at)
  at = max(at, 0)
  local first, begin, length = stretch_of_windows(budget, 1, at)
  if first then return first + floor((at - begin) / length) end
  return floor((at + budget.shift) / budget.width)
end

local function begin_of(budget, index)
  local first, begin, length = stretch_of_windows(budget, 0, index)
  if first then return begin + (index - first) * length end
  return index * budget.width - budget.shift
end

local function touched(budget, at)
  return index_of(budget, at - budget.before), index_of(budget, at + budget.after)
end

-- If the buckets that end with this one are full: the first one for which enough of them are forgotten.
local function full_until(budget, index)
  local spent, used, til = budget.spent, 0, nil
  for i = 1, #spent, 2 do
    if spent[i] + budget.span > index then used = used + spent[i + 1] end
  end
  for i = 1, #spent, 2 do
    if spent[i] + budget.span > index then
      if used < budget.calls then break end
      used = used - spent[i + 1]
      til = spent[i] + budget.span
    end
  end
  return til
end

local function budget_free_at(budget, at)
  while true do
    local first, last = touched(budget, at)
    local til
    for index = first, last do
      til = full_until(budget, index)
      if til then break end
    end
    if not til then return at end
    at = begin_of(budget, til) + budget.before
  end
end

local function add(budget, index, calls)
  local spent = budget.spent
  local place = #spent + 1
  while place > 1 and spent[place - 2] > index do place = place - 2 end
  if place > 1 and spent[place - 2] == index then
    spent[place - 1] = spent[place - 1] + calls
  else
    table.insert(spent, place, index)
    table.insert(spent, place + 1, calls)
  end
end

local function charge(budget, at)
  local first, last = touched(budget, at)
  for index = first, last do add(budget, index, 1) end
  local spent = budget.spent
  while #spent > 0 and spent[1] + budget.span <= first do
    table.remove(spent, 1)
    table.remove(spent, 1)
  end
end

local function refund(budget, at)
  local first, last = touched(budget, at)
  local spent = budget.spent
  for i = #spent - 1, 1, -2 do
    if spent[i] >= first and spent[i] <= last then
      spent[i + 1] = spent[i + 1] - 1
      if spent[i + 1] <= 0 then
        table.remove(spent, i)
        table.remove(spent, i)
      end
    end
  end
end

-- ---------------------------------------------------------------- paces (share.rs, adapt.rs)

local DELAYS = 5000000
local SLOWER, PROBE_PER_MINUTE, STRETCH_MAX, STRETCH_MIN, DEAF, QUIET_MAX = 1.05, 0.001, 100, 0.001, 4, 10000000

local function pace_new(basis)
  return { basis = basis, operator = 1, calendar = 1, stretch = 1, deaf = 0, quiet = 0, refused = 0, learned = 0,
    from = 0, slots = 0, before = 0 }
end

local function stretched(spacing, by) return by == 1 and spacing or math.ceil(spacing * by - 1e-6) end

-- The least share that workers whose calls leave late ask for, and until when it counts unless it is said again. Each
-- worker has its own, so that the last one to speak does not undo the others', and one that has died slows nobody for long.
local function least_of_delays(pace)
  local least, til = 1, 0
  -- A state of an earlier version has a number.
  if type(pace.delays) ~= 'table' then return least, til end
  for _, one in pairs(pace.delays) do
    if one.til > now and (one.share < least or one.share == least and one.til > til) then least, til = one.share, one.til end
  end
  return least, til
end

local function set_delays(pace, worker, share)
  local delays = type(pace.delays) == 'table' and pace.delays or {}
  for other, one in pairs(delays) do
    if one.til <= now then delays[other] = nil end
  end
  delays[worker] = share < 1 and { share = share, til = now + DELAYS } or nil
  pace.delays = next(delays) and delays or nil
end

-- By how much all but late calls stretch the spacings, and by how much everything does.
local function stretch_without_delays(pace) return pace.stretch / (pace.operator * pace.calendar) end
local function stretch_of(pace) return stretch_without_delays(pace) / least_of_delays(pace) end

local function pace_slot(pace, at)
  local quiet = pace.quiet == 0 and 0 or min(max(at - pace.quiet, 0), QUIET_MAX)
  pace.quiet = max(pace.quiet, at)
  if pace.basis == 'free' and pace.learned == 0 then
    if at >= pace.from + 1000000 then
      pace.before = at < pace.from + 2000000 and pace.slots or 0
      pace.from, pace.slots = at, 0
    end
    pace.slots = pace.slots + 1
    return
  end
  local minutes = quiet / 60000000
  local shorter = 1 - PROBE_PER_MINUTE * minutes
  if pace.basis == 'guess' and pace.refused == 0 then shorter = 2 ^ -minutes end
  pace.stretch = max(pace.stretch * shorter, pace.basis == 'known' and 1 or STRETCH_MIN)
end

local function pace_refuse(pace, left, planned)
  pace.refused = pace.refused + 1
  if left < pace.deaf then return end
  if planned == 0 and pace.learned == 0 then pace.learned = floor(1000000 / max(pace.slots, pace.before, 1)) end
  pace.stretch = min(pace.stretch * SLOWER, STRETCH_MAX)
  pace.deaf = max(now, left) + DEAF * stretched(planned > 0 and planned or pace.learned, pace.stretch)
  pace.quiet = max(pace.quiet, now)
end

-- ---------------------------------------------------------------- gates

local function gate_free_at(gate, at)
  at = max(at, gate.next)
  while true do
    local later = at
    for _, budget in ipairs(gate.budgets) do later = budget_free_at(budget, later) end
    if later == at then return at end
    at = later
  end
end

local function gate_take(gate, at, spacing)
  gate.next = at + spacing
  for _, budget in ipairs(gate.budgets) do charge(budget, at) end
end

local function gate_refund(gate, at)
  for _, budget in ipairs(gate.budgets) do refund(budget, at) end
end

-- What may have happened that this state does not know: slots up to `horizon` (all that is leased), and calls
-- since `since` as fast as anything lets them. Without `since` the past is unknown altogether.
local function gate_doubt(gate, horizon, phase, since, known)
  gate.next = max(gate.next, horizon + gate.spacing + phase)
  -- Everybody has ended in good order: nothing is leased, and nothing was called since.
  if since == INFINITE then return end
  for _, budget in ipairs(gate.budgets) do
    local calls = 0
    if since then
      local fastest = gate.fastest or 0
      calls = fastest > 0 and min(budget.calls, floor((horizon - since) / fastest) + 1) or budget.calls
    elseif budget.learns or known then
      calls = budget.calls
    end
    if calls > 0 then
      local first, last = touched(budget, horizon)
      for index = first, last do add(budget, index, calls) end
    end
  end
end

-- ---------------------------------------------------------------- state

local accounts, changed = {}, {}

local function unpacked(name, packed)
  accounts[name] = packed and cmsgpack.unpack(packed) or false
  -- A state of an earlier version.
  if accounts[name] and not accounts[name].pace then accounts[name].pace = pace_new('known') end
end

local function account(name)
  if accounts[name] == nil then unpacked(name, redis.call('HGET', ACCOUNT, name)) end
  return accounts[name]
end

-- A call takes only so many arguments.
local MANY = 1000

-- Calls with all arguments of a list behind the key, `each` of which belong together.
local function call_with(command, key, list, each)
  local step = MANY - MANY % each
  for first = 1, #list, step do redis.call(command, key, unpack(list, first, min(first + step - 1, #list))) end
end

-- Calls under way, of all workers; counted only for accounts with a cap.
local function in_flight(state)
  local calls = 0
  for _, count in pairs(state.flying) do calls = calls + count end
  return calls
end

local function load_accounts(names)
  for first = 1, #names, MANY do
    local last = min(first + MANY - 1, #names)
    for place, packed in ipairs(redis.call('HMGET', ACCOUNT, unpack(names, first, last))) do
      local name = names[first + place - 1]
      if accounts[name] == nil then unpacked(name, packed) end
    end
  end
end

local function count_call(name, worker, by)
  local state = account(name)
  if not state or not state.cap then return end
  state.flying[worker] = max(0, (state.flying[worker] or 0) + by)
  if state.flying[worker] == 0 then state.flying[worker] = nil end
  changed[name] = true
end

local function ready_at(state)
  if state.disabled or (state.cap and in_flight(state) >= state.cap) then return INFINITE end
  return gate_free_at(state.gate, state.held)
end

local function save()
  local packed, queued = {}, {}
  for name in pairs(changed) do
    local state = accounts[name]
    packed[#packed + 1], packed[#packed + 2] = name, cmsgpack.pack(state)
    local list = queued[state.address] or {}
    list[#list + 1], list[#list + 2], queued[state.address] = digits(ready_at(state)), name, list
  end
  call_with('HSET', ACCOUNT, packed, 2)
  for address, list in pairs(queued) do call_with('ZADD', queue(address), list, 2) end
  meta.last = max(meta.last, now)
  redis.call('SET', META, cmsgpack.pack(meta))
end

local function address_named(list, name)
  for number, address in ipairs(list) do
    if address.name == name then return address, number end
  end
end

-- What the source and its addresses may have called.
local function doubt_shared(horizon, since, known)
  gate_doubt(meta.source, horizon, 0, since, known)
  for _, gate in ipairs(meta.addresses) do gate_doubt(gate, horizon, 0, since, known) end
  meta.next_start = max(meta.next_start, horizon)
  redis.call('DEL', RETURNED)
end

-- Accounts are spread over the time that each has to itself.
local function phase_of(state) return floor(state.gate.spacing * ((state.place or 1) - 1) / max(meta.count or 1, 1)) end

-- All accounts are to be looked at: what was asked for while that is under way is done by another pass.
local function request_pass()
  if meta.pass then meta.pass.again = true else meta.pass = { cursor = '0' } end
end

-- This state may lack what was called since then: nobody gets slots until that is made up for in every account.
local function begin_doubt(since)
  local horizon, before = now + meta.lease, meta.doubt
  if before then since = min(since, before.since) end
  doubt_shared(horizon, since, true)
  meta.doubted = meta.doubted + 1
  meta.doubt = { horizon = horizon, since = since }
  -- From the beginning: the cursor was another server's.
  meta.pass = { cursor = '0', again = meta.pass and meta.pass.again }
end

-- How far the state's clock was ahead of this one, if that is why it counts no more.
local ahead

local function unknown() return { 'unknown', now, ahead and digits(ahead) or false } end

-- Loads what concerns the source; false if there is no whole state.
local function load()
  local worker = input.worker
  local packed = redis.call('GET', META)
  if not packed then return false end
  meta = cmsgpack.unpack(packed)
  -- All its times are of that other clock; who is held, and what is spent, workers know.
  if meta.last > now + LEAP then
    ahead = meta.last - now
    return false
  end
  meta.pace = meta.pace or pace_new('known')
  meta.doubted = meta.doubted or 0
  for _, gate in ipairs(meta.addresses) do gate.pace = gate.pace or pace_new('known') end
  local writes = ARGV[1] == 'configure' or ARGV[1] == 'accounts'
  -- A state of an earlier version, with all names: it is kept, and the plan is written anew.
  if not meta.count and not writes then return false end
  if meta.loading then
    -- Not all accounts are there yet, or never will be.
    if not writes and (not meta.loading.known or meta.loading.at + LOADING < now) then return false end
  else
    -- Redis may have been told to evict keys when memory is short.
    local queued, count = 0, meta.count or #meta.names
    for address = 1, #meta.addresses do queued = queued + redis.call('ZCARD', queue(address)) end
    if queued < count or redis.call('HLEN', ACCOUNT) < count then return false end
  end
  if meta.run ~= run then
    -- A restart or a failover: this state may be older than the last leases.
    begin_doubt(min(meta.last, now))
    meta.run = run
  end
  if worker and meta.has_caps then
    meta.workers[worker] = now
    if meta.gone then meta.gone[worker] = nil end
    for other, seen in pairs(meta.workers) do
      -- Its calls have ended, whatever became of it.
      if seen + input.gone < now then
        meta.gone = meta.gone or {}
        meta.gone[other], meta.workers[other] = true, nil
        request_pass()
      end
    end
  end
  -- A clock that was set back must not hand out times again; it hands out none until it has caught up.
  if now < meta.last then now = meta.last end
  return true
end

-- ---------------------------------------------------------------- what to do

-- Keeps what is spent of a budget whose rule is still the same.
local function gate_of(rules, old)
  local gate = { spacing = rules.spacing, fastest = rules.fastest, next = old and old.next or 0, budgets = {} }
  for number, rule in ipairs(rules.budgets) do
    rule.spent = {}
    if rule.calendar == cjson.null then rule.calendar = nil end
    for _, budget in ipairs(old and old.budgets or {}) do
      if budget.width == rule.width and budget.span == rule.span and budget.shift == rule.shift
        and budget.calendar == rule.calendar then
        rule.spent = budget.spent
      end
    end
    gate.budgets[number] = rule
  end
  return gate
end

-- What was learned of a limit is forgotten when that changes; what people asked for stays.
local function pace_of(one, before)
  local old = before and before.pace
  if old and old.basis == one.basis and before.gate.spacing == one.rules.spacing then return old end
  local pace = pace_new(one.basis)
  if old then pace.operator, pace.calendar, pace.refused = old.operator, old.calendar, old.refused end
  return pace
end

local function spent_of(gate)
  local lists = {}
  for number, budget in ipairs(gate.budgets) do lists[number] = budget.spent end
  return lists
end

-- Whether this state was made without what some worker knows of the past: then that one has to tell of it first.
local function is_uninformed() return not meta.informed and input.birth ~= digits(meta.birth) end

-- What is spent of some accounts, and if it is asked for of all that they share, for a worker to keep in case that this
-- state is lost.
local function remember()
  if not load() or is_uninformed() then return unknown() end
  if meta.loading or meta.doubt then return { 'done', now } end
  local memory = { at = digits(now), accounts = {} }
  if input.whole then
    memory.source, memory.addresses = spent_of(meta.source), {}
    for number, gate in ipairs(meta.addresses) do memory.addresses[number] = spent_of(gate) end
  end
  load_accounts(input.names)
  for _, name in ipairs(input.names) do
    local state = account(name)
    if state then memory.accounts[name] = spent_of(state.gate) end
  end
  return { 'memory', now, cjson.encode(memory) }
end

local function recall(gate, lists)
  for number, budget in ipairs(gate.budgets) do
    if lists and lists[number] then
      -- What was counted by a clock that had leapt ahead was called lately.
      local last = index_of(budget, now + meta.lease + budget.after)
      budget.spent = {}
      for i = 1, #lists[number], 2 do add(budget, min(lists[number][i], last), lists[number][i + 1]) end
    end
  end
end

-- Takes over what a worker remembers of what all share; since when nothing is known.
local function recall_shared(memory)
  recall(meta.source, memory.source)
  for number, gate in ipairs(meta.addresses) do recall(gate, memory.addresses[number]) end
  local at = tonumber(memory.at)
  return at > now and now - LEAP or at
end

local function refund_slot(name, at, address)
  local state = account(name)
  if not state then return end
  gate_refund(state.gate, at)
  if address then gate_refund(address, at) end
  gate_refund(meta.source, at)
  changed[name] = true
end

local function forget(member, name, at)
  redis.call('ZREM', RETURNED, member)
  local state = account(name)
  if state then refund_slot(name, at, meta.addresses[state.address]) end
end

-- The slots that came back, by account; once in a call.
local returned_of
local function returned_by(name)
  if not returned_of then
    returned_of = {}
    for _, member in ipairs(redis.call('ZRANGE', RETURNED, 0, -1)) do
      local at, other = string.match(member, '^(%d+):%d+:(.*)$')
      returned_of[other] = returned_of[other] or {}
      table.insert(returned_of[other], { member, tonumber(at) })
    end
  end
  return returned_of[name] or {}
end

local function move_to(name, state, address)
  for _, one in ipairs(returned_by(name)) do forget(one[1], name, one[2]) end
  redis.call('ZREM', queue(state.address), name)
  state.address, changed[name] = address, true
end

-- Sends an account away from an address that is held, or home to one that is not any more.
local function settle(name, state)
  local wanted, held = state.home, meta.addresses[state.home].held
  if held > now and #state.fallbacks > 0 then
    meta.home_at = min(meta.home_at or INFINITE, held)
    for _, other in ipairs(state.fallbacks) do
      if meta.addresses[other].held <= now then wanted = other break end
    end
  end
  if wanted ~= state.address then move_to(name, state, wanted) end
end

-- What a pass does to an account; a second time it does nothing.
local function visit(name, state)
  if meta.doubt and (state.doubted or 0) < meta.doubted then
    gate_doubt(state.gate, meta.doubt.horizon, phase_of(state), meta.doubt.since, true)
    state.doubted, changed[name] = meta.doubted, true
  end
  for other in pairs(meta.gone or {}) do
    if state.flying[other] then state.flying[other], changed[name] = nil, true end
  end
  -- Whose plan is half written has accounts whose addresses are those of the former one.
  if meta.loading then return end
  if state.plan ~= meta.plan then
    redis.call('ZREM', queue(state.address), name)
    redis.call('HDEL', ACCOUNT, name)
    accounts[name], changed[name] = false, nil
  elseif meta.hops then
    settle(name, state)
  end
end

-- The next piece of the pass, if there is one.
local function advance()
  local pass = meta.pass
  if not pass then return end
  -- What belongs to the plan is known when all of it is there.
  local found = redis.call('HSCAN', ACCOUNT, pass.cursor, 'COUNT', meta.doubt and PIECE_ALONE or PIECE)
  pass.cursor = found[1]
  for i = 1, #found[2], 2 do
    local name = found[2][i]
    if accounts[name] == nil then unpacked(name, found[2][i + 1]) end
    if accounts[name] then visit(name, accounts[name]) end
  end
  if pass.cursor == '0' then
    meta.doubt, meta.pass = nil, pass.again and { cursor = '0' } or nil
    if not pass.again then meta.gone = nil end
  end
end

local function configured()
  save()
  if not meta.informed then redis.call('PUBLISH', KEYS[1] .. ':hold', cjson.encode({ birth = digits(meta.birth) })) end
  return { 'configured', now, digits(meta.birth) }
end

-- Begins to write a plan: all but its accounts. Nothing else is to be done if it is the one that is there.
local function configure()
  local known = load()
  local loading = known and meta.loading
  -- One at a time.
  if loading and loading.by ~= input.by and loading.at + LOADING >= now then return { 'busy', now } end
  if loading and not loading.known then known = false end
  if known and not loading and meta.plan == input.id and (meta.informed or not input.known) then
    meta.lease, meta.calendars = input.lease, input.plan.calendars
    meta.informed = meta.informed or input.read
    return configured()
  end
  local plan, queues = input.plan, max(#input.plan.addresses, meta and #meta.addresses or 0)
  if not known then
    -- Not at once: it may be large.
    redis.call('UNLINK', META, ACCOUNT, RETURNED, RUNS)
    for address = 1, queues do redis.call('UNLINK', queue(address)) end
    meta = { run = run, birth = now, last = now, next_start = 0, held = 0, disabled = false, seq = 0, addresses = {},
      workers = {}, doubted = 0 }
    accounts = {}
  end
  local old = meta
  meta = {
    run = run, birth = old.birth, informed = old.informed, last = old.last, next_start = old.next_start, held = old.held, disabled = old.disabled,
    why = old.why, since = old.since, released = old.released,
    seq = old.seq + 1, number = old.number or 0, lease = input.lease, interval = plan.interval,
    calendars = plan.calendars,
    pace = old.pace or pace_new('known'), source = gate_of(plan.source, old.source), addresses = {}, workers = old.workers,
    count = input.count, hops = input.hops, has_caps = input.capped,
    doubted = old.doubted, doubt = old.doubt, pass = old.pass, gone = old.gone,
    -- For processes of an earlier version.
    names = {}, capped = {},
  }
  for number, rules in ipairs(plan.addresses) do
    local before = address_named(old.addresses, rules.name)
    local gate = gate_of(rules, before)
    gate.name, gate.held = rules.name, before and before.held < INFINITE and before.held or 0
    if before then gate.why, gate.since, gate.released = before.why, before.since, before.released end
    gate.pace = before and before.pace or pace_new('known')
    if known and not before then gate_doubt(gate, now + input.lease, 0, nil, false) end
    meta.addresses[number] = gate
  end
  loading = { by = input.by, at = now, known = known, informed = input.known or input.read,
    queues = max(queues, old.loading and old.loading.queues or 0) }
  -- New state, or state that somebody made who knew nothing of calls that this worker knows of.
  if not known or (input.known and not old.informed) then
    local since = input.memory and recall_shared(input.memory) or nil
    if since and input.quiet then since = INFINITE end
    doubt_shared(now + meta.lease, since, input.known)
    meta.doubted = meta.doubted + 1
    loading.doubts, loading.since, loading.knows = true, since, input.known
  end
  meta.loading = loading
  save()
  return { 'loading', now }
end

-- Writes some accounts of a plan; with the last call, which has none, it counts.
local function write_accounts()
  if not load() or not meta.loading or meta.loading.by ~= input.by then return unknown() end
  local loading, names = meta.loading, {}
  loading.at = now
  for place, one in ipairs(input.accounts) do names[place] = one.name end
  if loading.known then load_accounts(names) end
  for place, one in ipairs(input.accounts) do
    local before = loading.known and account(one.name) or nil
    if before and before.address ~= one.address + 1 then redis.call('ZREM', queue(before.address), one.name) end
    local state = {
      pace = pace_of(one, before), gate = gate_of(one.rules, before and before.gate), address = one.address + 1, home = one.address + 1,
      fallbacks = {},
      held = before and before.held or 0, disabled = before and before.disabled or false,
      why = before and before.why, since = before and before.since, released = before and before.released,
      cap = one.cap > 0 and one.cap or nil, flying = before and before.flying or {},
      plan = input.id, place = input.first + place, doubted = before and before.doubted or 0,
    }
    for number, other in ipairs(one.fallbacks) do state.fallbacks[number] = other + 1 end
    if not before then state.doubted = meta.doubted end
    if loading.known and not before then gate_doubt(state.gate, now + meta.lease, 0, nil, false) end
    if loading.doubts then
      if input.memory and input.memory[one.name] then recall(state.gate, input.memory[one.name]) end
      gate_doubt(state.gate, now + meta.lease, phase_of(state), loading.since, loading.knows)
      -- What a failover left to be made up for is, if what it is about is not older.
      if not meta.doubt then state.doubted = meta.doubted end
    end
    accounts[one.name], changed[one.name] = state, true
  end
  if not input.is_last then
    save()
    return { 'loading', now }
  end
  for address = #meta.addresses + 1, loading.queues do redis.call('UNLINK', queue(address)) end
  meta.plan, meta.loading, meta.informed = input.id, nil, meta.informed or loading.informed
  -- Accounts of the former plan go, and those whose address is held.
  if loading.known then
    request_pass()
    advance()
  end
  return configured()
end

local function free_at(state, at)
  local address = meta.addresses[state.address]
  at = max(at, address.held)
  while true do
    local later = gate_free_at(meta.source, gate_free_at(address, gate_free_at(state.gate, at)))
    if later == at then return at end
    at = later
  end
end

-- Accounts that the worker who asks does not know.
local foreign, foreign_count = {}, 0
local FOREIGN_AHEAD = 250000
for _, name in ipairs(input.foreign or {}) do foreign[name], foreign_count = true, foreign_count + 1 end

-- The accounts that may be needed for `count` slots, by address: the longest idle in their order, the first of those that
-- wait as a heap by the time at which they may call.
local function load_candidates(count, earliest)
  local found, names = {}, {}
  local function take(list, is_idle)
    local taken = {}
    for i = 1, #list, 2 do
      if not foreign[list[i]] then
        local one = { name = list[i], ready = tonumber(list[i + 1]), idle = is_idle }
        taken[#taken + 1], names[#names + 1] = one, one.name
      end
    end
    return taken
  end
  local limit, border = tostring(count + foreign_count), digits(earliest)
  for address = 1, #meta.addresses do
    local key = queue(address)
    local idle = take(redis.call('ZRANGEBYSCORE', key, '-inf', border, 'WITHSCORES', 'LIMIT', '0', limit), true)
    local waiting = take(redis.call('ZRANGEBYSCORE', key, '(' .. border, '(inf', 'WITHSCORES', 'LIMIT', '0', limit), false)
    found[address] = { idle = idle, first = 1, waiting = waiting }
  end
  -- About as many as will get a slot.
  load_accounts({ unpack(names, 1, min(#names, count)) })
  return found
end

-- Puts an account into a heap, in which the earliest comes first.
local function heap_push(heap, one)
  local place = #heap + 1
  while place > 1 and heap[floor(place / 2)].ready > one.ready do
    heap[place], place = heap[floor(place / 2)], floor(place / 2)
  end
  heap[place] = one
end

-- Takes the first of a heap out.
local function heap_pop(heap)
  local last = table.remove(heap)
  if #heap == 0 then return end
  local place = 1
  while true do
    local child = 2 * place
    if child > #heap then break end
    if child < #heap and heap[child + 1].ready < heap[child].ready then child = child + 1 end
    if heap[child].ready >= last.ready then break end
    heap[place], place = heap[child], child
  end
  heap[place] = last
end

-- An account has got a slot, or its calls under way have changed: it waits until its next one.
local function wait_on(of, one, ready)
  if one.idle then of.first = of.first + 1 else heap_pop(of.waiting) end
  one.ready, one.idle = ready, false
  heap_push(of.waiting, one)
end

-- The first of a list. Of an account with a cap another worker's slot, which came back, may have changed when it is ready.
local function head(of, is_idle)
  while true do
    local one = is_idle and of.idle[of.first] or not is_idle and of.waiting[1] or nil
    local state = one and account(one.name)
    local ready = state and state.cap and ready_at(state) or 0
    if not one or ready <= one.ready or one.ready >= INFINITE then return one end
    wait_on(of, one, ready)
  end
end

-- The account with the earliest slot, and its time.
local function candidate(found, earliest)
  local first, first_at
  local function consider(one, at)
    if not one then return end
    at = free_at(account(one.name), at)
    if not first_at or at < first_at then first, first_at = one, at end
  end
  local idle_at = max(earliest, meta.next_start)
  for address = 1, #meta.addresses do
    local of = found[address]
    consider(head(of, true), idle_at)
    local waiting = head(of, false)
    consider(waiting, waiting and waiting.ready)
  end
  return first, first_at
end

-- The address of an account has this name. One of a plan that is being replaced may have none.
local function is_at(state, name)
  local address = meta.addresses[state.address]
  return address and address.name == name
end

local function is_held(state, at)
  local address = state and meta.addresses[state.address]
  return not address or meta.disabled or state.disabled or at < state.held or at < meta.held or at < address.held
end

-- Takes slots back, and forgets those that nobody can use any more.
local function take_back(earliest)
  for i = 1, #input.returned, 3 do
    local at, name, from = input.returned[i], input.returned[i + 1], input.returned[i + 2]
    local state = account(name)
    if at > now + meta.lease + LEAP then
      -- Of a clock that had leapt ahead.
    elseif state and is_at(state, from) then
      meta.number = meta.number + 1
      redis.call('ZADD', RETURNED, digits(at), digits(at) .. ':' .. meta.number .. ':' .. name)
    else
      -- The account's calls leave from elsewhere now.
      refund_slot(name, at, (address_named(meta.addresses, from)))
    end
    count_call(name, input.worker, -1)
  end
  for _, name in ipairs(input.ended) do count_call(name, input.worker, -1) end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', RETURNED, '-inf', '(' .. digits(earliest))) do
    local at, name = string.match(member, '^(%d+):%d+:(.*)$')
    forget(member, name, tonumber(at))
  end
end

-- The first slot that came back, that is not held, and that the worker who asks can use.
local function returned()
  local place = 0
  while true do
    local member = redis.call('ZRANGE', RETURNED, place, place)[1]
    if not member then return nil end
    local at, name = string.match(member, '^(%d+):%d+:(.*)$')
    at = tonumber(at)
    if foreign[name] then
      place = place + 1
    elseif not is_held(account(name), at) then
      return member, name, at
    else
      forget(member, name, at)
    end
  end
end

-- ---------------------------------------------------------------- passing on (redis/local/express.rs)

-- What was granted is near enough if it comes so soon after the first that others could pass on.
local NEAR = 20000

-- Whether anybody hears it.
local function tell(worker, word)
  return redis.call('PUBLISH', KEYS[1] .. ':express:' .. worker, cjson.encode(word)) > 0
end

-- Slots that this worker leaves to others. Whoever is not there loses them: nobody else has them.
local function pass_on()
  local passed, gone = input.passed or {}, {}
  for i = 1, #passed, 4 do
    local at, name, from, to = passed[i], passed[i + 1], passed[i + 2], passed[i + 3]
    local state = account(name)
    count_call(name, input.worker, -1)
    if state and is_at(state, from) and not is_held(state, at) then
      count_call(name, to, 1)
      gone[to] = gone[to] or {}
      table.insert(gone[to], { name, digits(at), from })
    else
      refund_slot(name, at, (address_named(meta.addresses, from)))
    end
  end
  for to, slots in pairs(gone) do tell(to, { slots = slots }) end
end

-- Notes who has these slots (names, times, addresses): runs of them without long gaps.
local function note_runs(slots)
  local gap, first, last, count = max(4 * max(meta.interval, meta.source.spacing), 20000), nil, nil, 0
  local function note()
    local run = digits(first) .. ':' .. count .. ':' .. input.worker
    redis.call('ZADD', RUNS, digits(last), run)
  end
  redis.call('ZREMRANGEBYSCORE', RUNS, '-inf', digits(now))
  for i = 2, #slots, 3 do
    if first and slots[i] > last + gap then
      note()
      first, count = nil, 0
    end
    first, last, count = first or slots[i], slots[i], count + 1
  end
  note()
end

-- Asks those who have the next slots to pass some of them on to this worker.
local function ask_others(count, share, from)
  local runs = {}
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', RUNS, digits(from), '+inf', 'WITHSCORES', 'LIMIT', 0, 64)) do
    local first, slots, worker = string.match(member, '^(%d+):(%d+):(.*)$')
    if worker then
      runs[#runs + 1] = { first = tonumber(first), slots = tonumber(slots), worker = worker }
    else
      local run = runs[#runs]
      run.last, run.from = tonumber(member), max(run.first, from)
    end
  end
  table.sort(runs, function(one, other) return one.from < other.from end)
  -- Who is gone hears nothing; in a cluster nobody seems to, so that this is only so often made up for.
  local unheard = 3
  local function ask(run, calls)
    local is_heard = tell(run.worker, { to = input.worker, count = calls, from = digits(run.from), share = share })
    if is_heard or unheard == 0 then count = count - calls else unheard = unheard - 1 end
  end
  local ending
  for _, run in ipairs(runs) do
    if count <= 0 then return end
    if run.worker ~= input.worker then
      local left = run.slots * (run.last - run.from) / max(run.last - run.first, 1)
      local calls = min(count, floor(max(left, 1) * share))
      -- What is hardly left of a run is perhaps gone.
      if calls > 0 then ask(run, calls) else ending = ending or run end
    end
  end
  if ending and count > 0 then ask(ending, 1) end
end

-- If somebody waits here, and what was just granted is not near.
local function hasten(slots)
  local one = input.express
  if not one or meta.disabled then return end
  local count, near = one.count, now + one.lead + NEAR
  for i = 2, #slots, 3 do
    if slots[i] <= near then count = count - 1 end
  end
  ask_others(count, one.share, max(now + one.lead, meta.held))
end

local function lease()
  if not load() or is_uninformed() then return unknown() end
  if meta.home_at and now >= meta.home_at then
    meta.home_at = nil
    request_pass()
  end
  advance()
  local earliest = max(now, meta.held)
  local til = now + min(input.ahead, meta.lease)
  -- Far ahead on some accounts alone, limits that all share would leave the others hardly a slot before then.
  if foreign_count > 0 then til = min(til, now + FOREIGN_AHEAD) end
  take_back(earliest)
  pass_on()
  local slots, next_at = {}, -1
  if meta.loading or meta.doubt then input.count = 0 end
  if not meta.informed and now < meta.birth + TELL then input.count, next_at = 0, meta.birth + TELL + input.ahead end
  local function grant(name, at)
    slots[#slots + 1], slots[#slots + 2], slots[#slots + 3] = name, at, meta.addresses[account(name).address].name
  end
  local found = input.count > 0 and not meta.disabled and load_candidates(input.count, earliest) or {}
  local left = meta.disabled and 0 or input.count
  while left > 0 do
    local one, at = candidate(found, earliest)
    local member, name, back_at = returned()
    if member and (not at or back_at <= at) then
      if back_at > til then next_at = back_at break end
      redis.call('ZREM', RETURNED, member)
      count_call(name, input.worker, 1)
      grant(name, back_at)
    else
      if not one then break end
      if at > til then next_at = at < INFINITE and at or -1 break end
      local state = account(one.name)
      local address, all = meta.addresses[state.address], stretch_of(meta.pace)
      if one.idle then meta.next_start = at + stretched(meta.interval, all) end
      pace_slot(state.pace, at)
      pace_slot(meta.pace, at)
      local planned = state.gate.spacing > 0 and state.gate.spacing or state.pace.learned
      -- At least a microsecond, so that accounts without a limit take turns.
      gate_take(state.gate, at, max(stretched(planned, all * stretch_of(state.pace)), 1))
      pace_slot(address.pace, at)
      gate_take(address, at, stretched(address.spacing, all * stretch_of(address.pace)))
      gate_take(meta.source, at, stretched(meta.source.spacing, all))
      count_call(one.name, input.worker, 1)
      changed[one.name] = true
      wait_on(found[state.address], one, ready_at(state))
      grant(one.name, at)
    end
    left = left - 1
  end
  if input.takes_part and #slots > 0 then note_runs(slots) end
  hasten(slots)
  save()
  return { 'slots', now, meta.seq, next_at, slots }
end

-- A release has no time.
local function announce(scope, til, state)
  meta.seq = meta.seq + 1
  local why, since = state.why or '', digits(state.since or 0)
  redis.call('PUBLISH', KEYS[1] .. ':hold', cjson.encode({ scope, digits(til), why, since }))
end

-- Holds a state, the source's, an address' or an account's, unless that has been released since; until when it was told.
local function hold_state(state, one)
  if one.since <= (state.released or -1) then return nil end
  local til = one.disabled and INFINITE or now + one.wait
  if one.disabled or (not state.disabled and til > state.held) then state.why, state.since = one.why, one.since end
  -- An address that is off is held for ever.
  if one.disabled and not one.address then state.disabled = true else state.held = max(state.held, til) end
  return til
end

-- Ends what holds a state, unless that is newer; whether it did.
local function release_state(state, one)
  state.released = max(state.released or 0, one.since)
  if (state.since or 0) > one.since then return nil end
  state.held, state.disabled, state.why, state.since = 0, false, nil, nil
  return 0
end

-- Moves the shared time of the source (no name), of an address or of an account, for everybody.
local function hold()
  if not load() then return unknown() end
  for _, one in ipairs(input.holds) do
    local address = one.address and address_named(meta.addresses, one.address)
    local state = not one.name and not one.address and meta or address or one.name and account(one.name)
    if state then
      local til = (one.release and release_state or hold_state)(state, one)
      if til then announce(address and ADDRESS .. one.address or one.name or '', til, state) end
      if one.name then changed[one.name] = true end
      if address and meta.hops then request_pass() end
    end
  end
  advance()
  save()
  return { 'held', now }
end

-- What still holds these accounts, and if it is asked for the source and its addresses: for whoever has missed an
-- announcement.
local function holds()
  if not load() then return unknown() end
  local list = {}
  local function add(name, state)
    local at = #list
    list[at + 1], list[at + 2] = name, state.disabled and '+inf' or digits(state.held)
    list[at + 3], list[at + 4] = state.why or '', digits(state.since or 0)
  end
  if input.whole then
    add('', meta)
    for _, address in ipairs(meta.addresses) do
      if address.held > now then add(ADDRESS .. address.name, address) end
    end
  end
  load_accounts(input.names)
  for _, name in ipairs(input.names) do
    local state = account(name)
    if state and (state.disabled or state.held > now) then add(name, state) end
  end
  return { 'holds', now, meta.seq, list }
end

-- Shares that somebody asks for, and refusals: of an account, of an address or else of the source, for everybody.
local function pace()
  if not load() then return unknown() end
  for _, one in ipairs(input.paces) do
    local state, gate = one.name and account(one.name), one.address and address_named(meta.addresses, one.address)
    local target, planned = meta.pace, max(meta.source.spacing, meta.interval)
    if one.name then target, planned = state and state.pace, state and state.gate.spacing end
    if one.address then target, planned = gate and gate.pace, gate and gate.spacing end
    if target then
      if one.age then
        pace_refuse(target, now - one.age, planned)
      elseif one.by == 'delays' then
        set_delays(target, input.from or '', one.share)
      else
        target[one.by] = one.share
      end
      if one.name then changed[one.name] = true end
      local delays, til = least_of_delays(target)
      local told = { account = one.name or '', address = one.address or '', share = 1 / stretch_without_delays(target),
        refused = target.refused, delays = delays, delays_til = digits(til) }
      redis.call('PUBLISH', KEYS[1] .. ':hold', cjson.encode(told))
    end
  end
  save()
  return { 'done', now }
end

local steps = { configure = configure, accounts = write_accounts, lease = lease, hold = hold, holds = holds, pace = pace, remember = remember }
return steps[ARGV[1]]()
